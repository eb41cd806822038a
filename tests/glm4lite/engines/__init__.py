"""Programs that run in other engines' own environments."""

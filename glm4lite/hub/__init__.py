"""Where a model is found: a folder, the embedded one, or a repository of the Hub, downloaded and verified."""

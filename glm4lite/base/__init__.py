"""What every room may use: errors, events, files, sizes."""

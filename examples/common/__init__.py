"""What the examples share: starting, settings and options, files and folders, tables, pictures, text of others."""

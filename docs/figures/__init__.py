"""Every picture of the site, drawn from data that the repository ships: `python -m docs.figures FOLDER`."""

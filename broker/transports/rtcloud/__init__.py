"""rt-cloud's dialect: daemons that dial in at `/wsData` and the like, and the form they sign in with."""

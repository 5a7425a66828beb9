"""What is told and drawn of finished runs: of one, of several seeds, of a sweep."""

"""Tables and plots of finished runs: of one, of several seeds, of a sweep."""

"""Studies: a grid of runs that answers one question, and the page that shows the answer."""

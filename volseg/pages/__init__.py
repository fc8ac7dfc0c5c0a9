"""Tables, figures and the results folder."""

"""From what the ranks left to a record and its figures."""

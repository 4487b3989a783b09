"""Tables, pages and progress for people."""

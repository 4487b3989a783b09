"""What is asked: the schema of a run, how it is composed, checked and explained."""

"""What is answered: prompt sets as token ids, and how they are divided into calls."""

"""From the files of the ranks to a record and its figures."""

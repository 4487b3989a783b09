"""The way from the files of the ranks to a record and its figures."""

"""What there is to see as tables, one function for each; a terminal, a page and a document print them alike."""

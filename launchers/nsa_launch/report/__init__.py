"""`report.html`: one run on one page that needs nothing else, from the files of its folder."""

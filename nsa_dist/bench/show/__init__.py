"""What was measured, for people: files, lines of text, pictures."""

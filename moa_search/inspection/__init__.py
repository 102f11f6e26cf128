"""Plans and results for people: `frames` are the tables, `printing` and `pages` show them, `plots` are the pictures."""

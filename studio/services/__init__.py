"""What the studio can do, as plain functions over a workspace and a user. They know no web page and load no torch."""

"""The browser front end. Empty so far: the `veneer` command does its work today."""

"""The page of `mmedit ui`: ask a picture, teach, undo, draw, change pictures, look at runs."""

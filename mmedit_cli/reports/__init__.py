"""What people read: reports as tables, pages and pictures."""

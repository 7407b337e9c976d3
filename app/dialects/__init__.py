"""What clients speak at our front doors."""

"""Progress lines, logs and plots."""

"""What surgery does to networks of others: equality on every architecture, and trainings before and after."""

"""What happens when something goes wrong that nobody expected, or when the machine runs short."""

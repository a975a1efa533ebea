"""``fastppo study``: methods beside each other on several tasks, a row each, over several seeds."""

"""Who holds which experts, lived: claiming, handing over, copies for others, and a slot's state as it travels."""

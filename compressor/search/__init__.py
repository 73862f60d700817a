"""The best model under a budget: a space of specs, trials that share their first passes, engines that run them."""

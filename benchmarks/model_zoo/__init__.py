"""Models that the pruning benchmark runs over: name -> a function that makes the model and its example inputs."""

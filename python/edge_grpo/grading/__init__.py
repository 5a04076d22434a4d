"""Whether a response is right: answers found and compared, reward functions, and the processes that run them."""

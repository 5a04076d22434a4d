"""Learning from collected samples: the policy with its optimizer, the totals of a step, the schedule."""

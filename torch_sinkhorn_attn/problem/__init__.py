"""From what a user passes to one checked problem: arguments, support, masks, marginals, feasibility."""

"""What a dense mask says of the support: which tokens it leaves active, and its extremes."""

"""From a plan to the parallel model of one rank."""

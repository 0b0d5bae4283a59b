"""HLO cost analysis, roofline, and TPU topologies for ahead-of-time compilation."""

"""What GLM-4 computes, in torch: the specification of everything faster."""

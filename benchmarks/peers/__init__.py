"""What parl-core is raced against, one module for each topic; each peer imports its package where it is made."""

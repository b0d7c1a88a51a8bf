"""What each curvature of the implicit term brings."""

"""Cells × update policies, and the engines that run the time loop. Needs torch alone."""

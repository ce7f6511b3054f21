"""Forward passes in which the use of a weight is displaced; the weight itself is never written."""

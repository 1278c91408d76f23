"""What makes a cluster keep its limits: desired state, nodes, and the loop between them."""

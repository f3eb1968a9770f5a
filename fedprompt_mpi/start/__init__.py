"""How a rank starts: imports without what nobody needs here, and once for all ranks of a node."""

"""Everything that touches FFCV: writing `.beton` files, loading from them, and the guard round both."""

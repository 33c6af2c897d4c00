"""What joins the rooms: plan and check, as the command line and the Python API ask them."""

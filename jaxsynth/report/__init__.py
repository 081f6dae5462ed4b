"""Reports: tables, plots, image grids, and the page that holds them."""

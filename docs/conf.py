from importlib.metadata import version as installed

project = "anyfit"
release = version = installed("anyfit")

extensions = ["myst_parser"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3  # headings can be linked to from other pages

exclude_patterns = ["_build"]
html_theme = "alabaster"  # comes with Sphinx; pages need nothing from the network
html_theme_options = {"description": "Write a learning task once; fit it anywhere."}
html_show_copyright = False
nitpicky = True

"""The web app; this file imports nothing, so that the command line can name the tabs."""

# Tab -> its title, in the order of the page; the module vision_attn.apps.web.<tab> is imported when the tab is built.
TABS = {"patterns": "Patterns", "backbones": "Backbones", "generate": "Generate", "ask": "Ask", "results": "Results"}
WITHOUT_MODEL = ("patterns", "results")  # no --model for these

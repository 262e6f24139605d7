"""`mathmind plots-page`: the page that `dvc plots` fills, with Vega inside it, so that it opens without a network.

.dvc/config names it. DVC's own page loads Vega from a server on the internet.
"""

from pathlib import Path

PAGE = Path(".dvc/tmp/plots.html")
_FRAME = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
{refresh_tag}
<title>mathmind: dvc plots</title>
<style>body { font-family: system-ui, sans-serif; margin: 2rem; } table { border-spacing: 15px; }</style>
<script>VEGA</script>
</head>
<body>
{plot_divs}
</body>
</html>
"""


def write_plots_page(folder: Path) -> Path:
    """Writes the page's frame into a working folder and returns its path; `{plot_divs}` is what DVC fills."""
    from vl_convert import javascript_bundle

    path = folder / PAGE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_FRAME.replace("VEGA", javascript_bundle().replace("</script", "<\\/script")), encoding="utf-8")
    return path

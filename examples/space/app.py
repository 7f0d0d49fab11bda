"""An app: one types a text and sees which component of the mixture each token comes from, and what each expected.

    python examples/space/app.py --model quickstart-out

As a Space the app takes the model's id from the variable MODEL; see README.md beside this file.
"""

import argparse
import os
from typing import Any

import gradio as gr

from hf_mos.tools.inspection.inspect_mixture import check_mixture, inspect_mixture
from hf_mos.tools.inspection.page import SCRIPT, STYLE, render_view
from hf_mos.tools.loading import load_model, load_tokenizer

MAX_CHARACTERS = 4000
EXAMPLES = (
    "Return a new list with the items of the iterable in ascending order.",
    "The file is opened for reading. If it does not exist, an OSError is raised.",
    "for name, value in sorted(items.items()):\n    print(name, value)",
)
# Of the machine that looks at it: no font is fetched.
FONTS = {
    "font": ["system-ui", "DejaVu Sans", "sans-serif"],
    "font_mono": ["ui-monospace", "DejaVu Sans Mono", "monospace"],
}


def main() -> None:
    arguments = parse_arguments()
    app = build_app(load_model(arguments.model), load_tokenizer(arguments.model), name=str(arguments.model))
    app.launch(
        server_port=arguments.port,
        theme=gr.themes.Base(**FONTS),
        head=f"<style>{STYLE}</style><script>{SCRIPT}</script>",
        footer_links=["api"],
        ssr_mode=False,
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = os.environ.get("MODEL")
    parser.add_argument(
        "--model", default=model, required=model is None, help="folder or Hub id (default: the variable MODEL)"
    )
    parser.add_argument("--port", type=int, help="default: 7860, or the next that is free")
    return parser.parse_args()


def build_app(model: Any, tokenizer: Any, name: str) -> gr.Blocks:
    """The app for a mixture and its tokenizer.

    Raises:
        ValueError: the model is no mixture.
    """
    check_mixture(model)

    def look(text: str) -> str:
        if not text.strip():
            raise gr.Error("Type some text first.", title="No text")
        if len(text) > MAX_CHARACTERS:
            raise gr.Error(
                f"At most {MAX_CHARACTERS:,} characters, please; these are {len(text):,}.", title="Too long"
            )
        try:
            return render_view(inspect_mixture(model, tokenizer, text=text))
        except (ValueError, FloatingPointError) as error:
            raise gr.Error(str(error)) from error

    with gr.Blocks(title="What a mixture of softmaxes does", analytics_enabled=False) as app:
        gr.Markdown(
            "# What a mixture of softmaxes does\n"
            f"`{name}` predicts each token with {model.mos_head.num_mixtures} softmaxes, weighed anew every time."
        )
        with gr.Row(equal_height=True):
            text = gr.Textbox(EXAMPLES[0], label="Text", lines=2, max_lines=12, scale=6, elem_id="text")
            button = gr.Button("Inspect", variant="primary", scale=1, min_width=120, elem_id="inspect")
        gr.Examples([[example] for example in EXAMPLES], inputs=text)
        view = gr.HTML(apply_default_css=False, elem_id="view")
        gr.on([button.click, text.submit], look, inputs=text, outputs=view, api_name="inspect")
    return app


if __name__ == "__main__":
    main()

r"""Ordinary mathematical writing as plain TeX: Unicode, Markdown, HTML, fonts and spacing brought to one spelling.

`tidy` changes how an answer is written and never what it says; the rest of the graders reads what it gives. Knows
no values.
"""

from __future__ import annotations

import html
import re
import unicodedata

MAX_TIDIED = 4000  # characters of an answer that are looked at; no answer is longer

_GREEK_NAMES = {
    "α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "ε": "epsilon", "ζ": "zeta", "η": "eta", "θ": "theta",
    "ι": "iota", "κ": "kappa", "λ": "lambda", "μ": "mu", "ν": "nu", "ξ": "xi", "π": "pi", "ρ": "rho", "σ": "sigma",
    "τ": "tau", "υ": "upsilon", "φ": "phi", "ϕ": "phi", "χ": "chi", "ψ": "psi", "ω": "omega", "Γ": "Gamma",
    "Δ": "Delta", "Θ": "Theta", "Λ": "Lambda", "Ξ": "Xi", "Π": "Pi", "Σ": "Sigma", "Φ": "Phi", "Ψ": "Psi", "Ω": "Omega",
}  # fmt: skip
_SIGNS = {
    **dict.fromkeys("−–‐‑‒﹣－", "-"), **dict.fromkeys("×✕✖⨯", "\\times "), **dict.fromkeys("·⋅∙・", "\\cdot "),
    **dict.fromkeys("≤⩽≦", "\\le "), **dict.fromkeys("≥⩾≧", "\\ge "), **dict.fromkeys("≈≃≅≒", "\\approx "),
    **dict.fromkeys("∅⌀", "\\emptyset "),
    **dict.fromkeys("→⇒⟹➜", "\\Rightarrow "), **dict.fromkeys("⁄∕", "/"), **dict.fromkeys("…⋯", "\\ldots "),
    **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u00ad", ""), **dict.fromkeys("′’‘ʹ", "'"), **dict.fromkeys("“”″", '"'),
    "÷": "\\div ", "∞": "\\infty ", "≠": "\\ne ", "±": "\\pm ", "∓": "\\mp ", "∪": "\\cup ", "∩": "\\cap ", "∈": "\\in ",
    "∉": "\\notin ", "ℝ": "\\mathbb{R}", "ℤ": "\\mathbb{Z}", "ℕ": "\\mathbb{N}", "ℚ": "\\mathbb{Q}", "ℂ": "\\mathbb{C}",
    "°": "^\\circ ", "º": "^\\circ ", "⌊": "\\lfloor ", "⌋": "\\rfloor ", "⌈": "\\lceil ", "⌉": "\\rceil ", "∖": "\\setminus ",
    "∧": "\\land ", "∨": "\\lor ", "∗": "*", "∣": "|", "⟨": "\\langle ", "⟩": "\\rangle ", "∑": "\\sum ", "∏": "\\prod ",
    "¢": " cents ", "∫": "\\int ", "℃": "^\\circ C", "℉": "^\\circ F", "、": ",", "∶": ":", "∛": "\\sqrt[3]",
    "∜": "\\sqrt[4]", "ℓ": "\\ell ",
    **{sign: f"\\{name} " for sign, name in _GREEK_NAMES.items()},
}  # fmt: skip
_SIGNS_TABLE = str.maketrans(_SIGNS)
_RAISED = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿⁱᵃᵇᵏᵐˣʸ", "0123456789+-=()niabkmxy", strict=True))
_LOWERED = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎ₙₓₖₘₐᵢⱼ", "0123456789+-=()nxkmaij", strict=True))
_RAISED_RUN, _LOWERED_RUN = re.compile(f"[{''.join(_RAISED)}]+"), re.compile(f"[{''.join(_LOWERED)}]+")
_OTHER_DIGIT = re.compile(r"(?![0-9])\d")
_VULGAR = re.compile("[¼-¾⅐-⅞]")
_ROOT = re.compile(r"√\s*(?:([0-9]+(?:\.[0-9]+)?|[A-Za-z](?![A-Za-z]))|)")

_RENAMED = {
    **dict.fromkeys(("dfrac", "tfrac", "cfrac", "nicefrac", "sfrac"), "frac"), **dict.fromkeys(("dbinom", "tbinom"), "binom"),
    **dict.fromkeys(("leq", "leqslant", "leqq"), "le"), **dict.fromkeys(("geq", "geqslant", "geqq"), "ge"),
    **dict.fromkeys(("lt", "textless"), "lt"), "neq": "ne", "varnothing": "emptyset", "bigcup": "cup", "bigcap": "cap",
    "backslash": "setminus", "smallsetminus": "setminus", **dict.fromkeys(("dots", "cdots", "dotsc", "dotsb"), "ldots"),
    **dict.fromkeys(("simeq", "cong", "doteq"), "approx"), "vee": "lor", "wedge": "land", "infin": "infty",
    **dict.fromkeys(("Longrightarrow", "implies", "rightarrow", "to", "longrightarrow"), "Rightarrow"), "ast": "cdot",
}  # fmt: skip
_SPELLED = {
    "lbrace": "\\{", "rbrace": "\\}", "lbrack": "[", "rbrack": "]", "lvert": "|", "rvert": "|", "vert": "|", "mid": "|",
    "lparen": "(", "rparen": ")", "colon": ":", "degree": "^\\circ ", "textdegree": "^\\circ ", "lt": "<", "gt": ">",
    "textgreater": ">", "textless": "<", "R": "\\mathbb{R}", "N": "\\mathbb{N}", "Z": "\\mathbb{Z}", "Q": "\\mathbb{Q}",
    "textdollar": "", "euro": "", "pounds": "", "textasciitilde": " ", "slash": "/", "textperiodcentered": "\\cdot ",
    "textminus": "-",
}  # fmt: skip
_DROPPED = [
    "left", "right", "middle", "displaystyle", "textstyle", "scriptstyle", "limits", "nolimits", "quad", "qquad", "enspace",
    "enskip", "thinspace", "medspace", "thickspace", "negthinspace", "space", "nobreakspace", "big", "Big", "bigg", "Bigg",
    "bigl", "bigr", "Bigl", "Bigr", "biggl", "biggr", "Biggl", "Biggr", "bigm", "Bigm", "rm", "bf", "it", "mathstrut",
    "strut", "noindent", "therefore", "thus", "hfill", "newline", "limits", "allowbreak", "nonumber",
]  # fmt: skip
_UNWRAPPED = [
    "boxed", "fbox", "mathbf", "mathit", "mathsf", "mathtt", "mathnormal", "boldsymbol", "bm", "underline", "underbrace",
    "ensuremath", "displaylines", "emph", "pmb", "mathop", "mathord",
]  # fmt: skip
_TEXTS = [
    "text", "textbf", "textit", "textrm", "textnormal", "texttt", "textsf", "textsc", "textup", "mbox", "hbox",
]  # fmt: skip
_FUNCTIONS = [
    "arcsin", "arccos", "arctan", "arccot", "arcsec", "arccsc", "arsinh", "arcosh", "artanh", "sinh", "cosh", "tanh", "coth",
    "sin", "cos", "tan", "cot", "sec", "csc", "log", "ln", "lg", "exp", "max", "min", "gcd", "lcm", "sqrt", "cbrt",
]  # fmt: skip
_WORDS = [*_FUNCTIONS, "pi", "infty", "theta", "alpha", "beta", "lambda", "omega"]
_COMMAND = re.compile(r"\\([A-Za-z]+)\s*")
_DROP = re.compile(r"\\(?:hspace|vspace|phantom|hphantom|label|tag|color)\*?\s*\{[^{}]*\}|\\text(?:\s*\{\s*\})")
_COLOURED = re.compile(r"\\(?:textcolor|colorbox)\s*\{[^{}]*\}")
_SPACES = re.compile(r"\\[!,;:> \n]|~|(?<!\\)&(?:nbsp|thinsp|ensp|emsp);")
_NAMED = re.compile(r"\\(?:operatorname|mathrm|mathop)\*?\s*\{\s*([A-Za-z]+)\s*\}")
_ROMAN = re.compile(r"\\mathrm(?![A-Za-z])")
_DOUBLED = re.compile(r"\\\\(?=[A-Za-z])")
_PLAIN_WORD = re.compile(rf"(?<![A-Za-z\\])({'|'.join(_WORDS)})(?![A-Za-z])")
_PLAIN_LOG = re.compile(r"(?<![A-Za-z\\])log_?([0-9]+)(?=\s*\()")
_INFINITY = re.compile(r"(?<![A-Za-z\\])(?:infinity|inf|oo)(?![A-Za-z])", re.IGNORECASE)
_CHOOSE = re.compile(r"\{([^{}]*)\\(choose|over)(?![A-Za-z])([^{}]*)\}")
_BLACKBOARD = re.compile(r"\\mathbb\s*([A-Z])")
_MODULO = re.compile(r"\(?\\p?mod\s*\{[^{}]*\}\)?|\\pmod\s*[0-9]")
_HTML = ((re.compile(r"<sup>(.*?)</sup>", re.I), r"^{\1}"), (re.compile(r"<sub>(.*?)</sub>", re.I), r"_{\1}"))
_TAGS = re.compile(r"</?(?:b|i|strong|em|p|br|code|span|div|math|u)\s*/?>", re.IGNORECASE)
_EMPHASIS = re.compile(r"(?<![\w)}\]*])(\*{1,3}|__)(?=[^\s*])(.{0,400}?)(?<=[^\s*])\1(?![\w(*])", re.DOTALL)
_STARS = re.compile(r"(?<=[\w)}])\s?(\*\*)\s?(?=[\w({\\-])|\*{2,3}")
_EDGES = " \t\r\n.,;:"
_OPEN_CLOSE = {"(": ")", "[": "]", "{": "}"}


def tidy(text: str) -> str:
    """The text in the one spelling that the graders read, without markup; at most `MAX_TIDIED` characters of it."""
    plain = _without_markup(_as_ascii(text[:MAX_TIDIED]))
    plain = _COLOURED.sub("", _NAMED.sub(_named, plain))
    plain = _COMMAND.sub(_command, _DROP.sub(" ", plain))
    plain = plain.replace("\\%", "%").replace("%", "\\%").replace("{,}", ",")
    plain = _MODULO.sub("", _BLACKBOARD.sub(r"\\mathbb{\1}", _CHOOSE.sub(_chosen, plain)))
    plain = _PLAIN_LOG.sub(r"\\log_{\1}", _INFINITY.sub(r"\\infty ", plain))
    plain = _PLAIN_WORD.sub(r"\\\1 ", plain)
    plain = re.sub(r"\.{2,}", r"\\ldots ", plain)
    plain = re.sub(r"<=", r"\\le ", re.sub(r">=", r"\\ge ", re.sub(r"!=|<>|=/=", r"\\ne ", plain)))
    plain = _STARS.sub(lambda stars: "^" if stars[1] else " ", plain.replace("+/-", "\\pm ").replace("==", "="))
    return " ".join(plain.split())


def bare(text: str) -> str:
    """A tidied text without the punctuation at its ends and the brackets that do nothing around all of it."""
    text = _stripped(text)
    while len(text) > 1 and text[0] == "{" and closing(text, 0) == len(text) - 1:
        text = _stripped(text[1:-1])
    return text


def _stripped(text: str) -> str:
    inner = text.strip(_EDGES)
    return "." + inner if inner[:1].isdecimal() and text[: text.index(inner)].endswith(".") else inner


def closing(text: str, start: int) -> int:
    """Where the bracket at a place is closed; -1 where it is not."""
    depth = 0
    for place in range(start, len(text)):
        if text[place] in "([{":
            depth += 1
        elif text[place] in ")]}":
            depth -= 1
            if depth == 0:
                return place if _OPEN_CLOSE[text[start]] == text[place] else -1
    return -1


def _as_ascii(text: str) -> str:
    text = _OTHER_DIGIT.sub(lambda digit: str(unicodedata.decimal(digit[0])), text)
    text = _RAISED_RUN.sub(lambda run: "^{" + "".join(_RAISED[sign] for sign in run[0]) + "}", text)
    text = _LOWERED_RUN.sub(lambda run: "_{" + "".join(_LOWERED[sign] for sign in run[0]) + "}", text)
    text = _VULGAR.sub(lambda sign: _fraction(sign[0]), text)
    text = _ROOT.sub(lambda root: f"\\sqrt{{{root[1]}}}" if root[1] else "\\sqrt ", text)
    return unicodedata.normalize("NFKC", text.translate(_SIGNS_TABLE)).translate(_SIGNS_TABLE)


def _fraction(sign: str) -> str:
    over, under = unicodedata.normalize("NFKD", sign).split("⁄")
    return f"\\frac{{{over}}}{{{under}}}"


def _without_markup(text: str) -> str:
    for pattern, replacement in _HTML:
        text = pattern.sub(replacement, text)
    text = html.unescape(_TAGS.sub(" ", text)) if "<" in text or "&" in text else text
    text = re.sub(r"\\?\$|[€£¥₹₽₩]", " ", _EMPHASIS.sub(r"\2", text.replace("`", "").strip()))
    text = text.replace("\\\\", "\\cr ") if "\\begin" in text else _DOUBLED.sub(r"\\", text)
    text = re.sub(r"(?<!\\)\\[()\[\]]", " ", text)
    return _SPACES.sub(lambda space: "" if space[0] == "\\!" else " ", text)


def _named(match: re.Match[str]) -> str:
    name = match[1]
    if len(name) == 1 and "mathrm" in match[0]:
        return f"{{{name}}}" if name in "eid" else f"\\text{{{name}}}"
    return f"\\{name} " if name in _FUNCTIONS or "operatorname" in match[0] else f"\\text{{{name}}}"


def _command(match: re.Match[str]) -> str:
    name = match[1]
    behind = match.string[match.end() : match.end() + 1]
    if name in _DROPPED or name in _UNWRAPPED:
        return ""
    if name in _TEXTS or name == "mathrm":
        return "\\text"
    if name in _SPELLED:
        return _SPELLED[name]
    gap = " " if behind.isalpha() else ""
    return f"\\{_RENAMED.get(name, name)}{gap}"


def _chosen(match: re.Match[str]) -> str:
    name = "binom" if match[2] == "choose" else "frac"
    return f"\\{name}{{{match[1].strip()}}}{{{match[3].strip()}}}"

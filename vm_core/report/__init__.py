def render_evaluation(*a):
    return ""


def render_explanations(*a):
    return ""

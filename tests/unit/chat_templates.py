"""Two chat templates of our own with the layout of EXAONE 4.0 and 4.5, for tests."""

STYLE_40 = """\
{%- if tools %}
    {{- '[|system|]\\n# Tools' }}
    {%- for tool in tools %}{{- '\\n<tool>' + (tool | tojson) + '</tool>' }}{% endfor %}
    {{- '[|endofturn|]\\n' }}
{%- endif %}
{%- for m in messages %}
    {{- '[|' + m.role + '|]\\n' }}
    {%- if m.role == 'assistant' %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}
    {%- if m.role == 'tool' %}
        {{- '<tool_result>' + ({'result': m.content} | tojson) + '</tool_result>' }}
    {%- else %}
        {{- m.content }}
    {%- endif %}
    {%- for call in m.tool_calls or [] %}
        {{- '<tool_call>' + ({'name': call.function.name, 'arguments': call.function.arguments} | tojson) }}
        {{- '</tool_call>' }}
    {%- endfor %}
    {{- '[|endofturn|]\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '[|assistant|]\\n<think>\\n' }}{% if not enable_thinking %}{{- '\\n</think>\\n\\n' }}{% endif %}
{%- endif %}
"""

STYLE_45 = """\
{%- set ns = namespace(last_user=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last_user = loop.index0 %}{% endif %}{% endfor %}
{%- if tools %}
    {{- '<|tool_declare|>\\n# Tools\\n' }}
    {%- for tool in tools %}{{- '<tool>' + (tool | tojson) + '</tool>\\n' }}{% endfor %}
    {{- '<|endofturn|>\\n' }}
{%- endif %}
{%- for m in messages %}
    {{- '<|' + m.role + '|>\\n' }}
    {%- if m.name %}{{- '(' + m.name + ') ' }}{% endif %}
    {%- if m.role == 'assistant' %}
        {%- set content, reasoning = m.content, m.reasoning_content or '' %}
        {%- if '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip() %}
            {%- set content = content.split('</think>')[-1].lstrip() %}
        {%- endif %}
        {%- if loop.index0 < ns.last_user %}{% set reasoning = '' %}{% endif %}
        {{- '<think>\\n' + reasoning + '\\n</think>\\n\\n' + content }}
    {%- elif m.role == 'tool' %}
        {{- '<tool_result>' + m.content + '</tool_result>' }}
    {%- elif m.content is string %}
        {{- m.content }}
    {%- else %}
        {%- for part in m.content %}
            {%- if part.type == 'image' %}{{- '<vision><|image_pad|></vision>\\n' }}
            {%- elif part.type == 'video' %}{{- '<vision><|video_pad|></vision>\\n' }}
            {%- else %}{{- part.text }}{% endif %}
        {%- endfor %}
    {%- endif %}
    {%- for call in m.tool_calls or [] %}
        {{- '<tool_call>' + ({'name': call.function.name, 'arguments': call.function.arguments} | tojson) }}
        {{- '</tool_call>' }}
    {%- endfor %}
    {{- '<|endofturn|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>\\n<think>\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}{{- '\\n</think>\\n\\n' }}{% endif %}
{%- endif %}
"""
